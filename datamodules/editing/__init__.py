"""Edit requests, and the data module of model editing."""
