"""Training a head by Latent Preference Optimization (arXiv 2411.09661), and evaluating it."""
