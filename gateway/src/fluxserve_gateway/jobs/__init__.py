"""Requests for pictures that outlive their connection, and the gateway that took them.

    intake      POST /v1/jobs → a row, and its input images as files
    routes      the other routes: look, list, cancel, fetch a picture
    store       every change of a job's state, each one transaction; database opens what it runs on
    files       pictures, in a folder or an object store
    worker      claims jobs under a lease, draws them, and beats to keep the lease
    webhooks    tells a caller's host that a job has ended
    upkeep      removes what was kept long enough

Gateways that share a database and a store of files share the jobs. Nothing but `settings` and `options` is imported
before jobs are wanted: SQLAlchemy and obstore are an extra of the distribution.
"""
