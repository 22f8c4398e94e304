"""Google's TPUs: chips as data, and what a program on one takes, simulated."""
