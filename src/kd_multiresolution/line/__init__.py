"""What is done with a trained model, of either kind, beside testing and predicting: its threshold is set again."""
