"""The command line: `fluxserve serve | demo | generate | export | repository | doctor`."""
