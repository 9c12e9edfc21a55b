"""IP-Adapter (Ye et al., arXiv 2308.06721), on diffusers' own modules: its weights' format, and its training."""
