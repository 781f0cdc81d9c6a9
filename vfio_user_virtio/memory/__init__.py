"""Guest memory: what the client mapped with DMA_MAP, as memoryviews."""
