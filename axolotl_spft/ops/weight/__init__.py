"""The frozen weight: W + S written into it, taken out of it, and dequantized."""
