"""The collector's HTTP side: who may ask, and the routers."""
