"""What normalization does inside a network, in numbers: quantities, and the one collection that reads them."""
