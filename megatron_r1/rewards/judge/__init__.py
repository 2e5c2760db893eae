"""A language model as a judge: what it is asked, what its replies mean, how votes are counted."""
