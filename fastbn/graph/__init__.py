"""Fusing on torch.fx graphs: the pattern matcher, its effects analysis, and the backends of torch.compile."""
