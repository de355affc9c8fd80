"""`estimate`: what a run needs of memory and hours, before anything of it is started."""
