"""What every component has, and the two kinds of components that options hold: row formats and renderers."""
