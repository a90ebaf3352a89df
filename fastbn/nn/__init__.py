"""The modules: subclasses and relatives of torch.nn's batch norms."""
