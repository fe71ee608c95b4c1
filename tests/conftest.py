"""Before any test imports torch: its waiting threads sleep, because tests share the machine with one another."""

from fluxserve import settings

settings.let_threads_sleep()
