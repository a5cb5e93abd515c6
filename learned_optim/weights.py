def fingerprint(n):
    return "x"


def load_network(*a, **k):
    raise NotImplementedError
