"""The control interface: what operators, monitors and orchestrators ask of a running server."""
