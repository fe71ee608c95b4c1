"""Parts that several families have: text encoders, VAEs, and the checks of a job. It knows no family."""
