"""What error is taken back."""
