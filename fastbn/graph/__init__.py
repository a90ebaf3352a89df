"""What acts on whole models and captured graphs: convert, fuse, fold, report, and the backends of torch.compile."""
