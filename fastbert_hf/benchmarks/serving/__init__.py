"""How fast whole encoders answer on a CPU, and how much their outputs differ: beside alternatives."""
