"""The table of docs/models.md: families of models and variants of PEFT, what is right, what is refused. `make models`.

`recipes.py` has the rows, `cells.py` measures one of them, `run.py` all, and `table.py` makes the document of them.
"""
