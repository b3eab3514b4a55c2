"""Generated gRPC code of package ``baton.v1``. ``make proto`` writes it; edit the .proto."""
