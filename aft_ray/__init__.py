"""aft_ray: Aggregation Fine-Tuning (arXiv 2501.11877) as a distributed Ray application.

The rooms, in the order data flows:

    records -> config -> templates -> engines -> inference -> data -> training -> serving -> evaluation

`records`, `templates`, `engines` and `inference` know nothing of Ray. Importing any module has no effect.
"""

__version__ = "0.1.0"
