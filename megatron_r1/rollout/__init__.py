"""How answers are sampled: engines behind one protocol, frozen samples, and the journal that they are kept in."""
