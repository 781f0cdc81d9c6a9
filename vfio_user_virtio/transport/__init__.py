"""vfio-user over UNIX stream sockets under trio: endpoint, session, listener, client."""
