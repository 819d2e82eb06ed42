"""What a pretrained model becomes: a reverse process on a Gaussian path or over tokens."""
