//! Chat templates as models on the hub carry them (Jinja), rendered by minijinja.
