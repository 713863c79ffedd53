"""The engine: what a run is, what it costs, how it trains, what is said about it. It never draws."""
