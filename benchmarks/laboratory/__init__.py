"""The laboratory: what teaching a model something costs it in what it knew, under every cure, measured side by side.

`make demo`, `make tax` and `make real` are three settings of it: demo.py, tax.py (with tax_cures.py) and real.py say
which model, objectives, cures and seeds are run, and how they are shown.

To add a task: one entry in ``TASKS`` of smollm2_texts.py, with the function that gives its rows; of the small model in
``OBJECTIVES`` of small.py, with the function that draws its batches and a learning rate in ``Settings``.
To add a setting of a cure: one entry in ``FAMILIES`` of tax_cures.py or ``CURES`` of real.py, and a colour for a new
family. A new kind of cure: one field of ``Cure`` in cures.py, and what it does in train.py.
To add a model: one class like ``Small`` or ``SmolLM2``; model.py says what is asked of it.

Data flows one way: texts -> model -> train -> runs (with the store) -> points -> report (table, figure, page).
"""
