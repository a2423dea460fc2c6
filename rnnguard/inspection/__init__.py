"""What the model is: its recurrences, what feeds them and who reads them."""
