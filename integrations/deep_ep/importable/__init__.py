"""A directory for sys.path: what lies here is imported as `deep_ep` and `deep_ep_cpp`."""
