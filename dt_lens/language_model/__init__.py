"""Language models, looked at where they lie: no layer is written anew and no weight is copied."""
