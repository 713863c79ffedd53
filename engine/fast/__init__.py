"""What makes a step lean: the adapter as one operation, and a loss that never holds all logits at once."""
