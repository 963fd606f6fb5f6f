"""Online and iterative DPO: rounds of samples of the present policy, labels, pairs and optimizer steps."""
