"""The public surface: doors (gRPC, HTTP), and the service behind them that leads requests through a private Triton."""
