"""The CSR mask, the plan of its rows and columns, and its tiles."""
