"""The three APIs of one runtime: Trio, asyncio and synchronous."""
