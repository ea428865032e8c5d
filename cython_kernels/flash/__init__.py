"""Reading: the reader of blocks, the stream, the cache of pages, single rows."""
