"""What a trained adapter becomes, so that other programs can use it."""
