"""Training methods. A method is a network, the views of a batch that it trains on, and its losses."""
