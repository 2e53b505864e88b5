"""Training: what a batch becomes (`corruption`), where it comes from (`feed`), and who watches (`running`)."""
