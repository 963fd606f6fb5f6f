"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908): steps, samplers, a small network, a Gaussian with known optimum."""
