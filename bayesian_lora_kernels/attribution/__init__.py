"""What each training example does to the loss of others."""
