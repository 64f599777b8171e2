"""`vit serve`: a network behind HTTP. `app.make_app` gives the ASGI application for a server of
your own."""
