"""Who belongs to a federation: identities, addresses, the signed roster, and how one is invited and joins."""
