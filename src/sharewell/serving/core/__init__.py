"""The engine core: requests of tokens in, tokens out; the host process and its asyncio side."""
