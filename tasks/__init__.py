"""The tasks, one file each: what is asked, how it is read, where an answer ends, how it is scored."""

from tasks import own, samsum, trivia_qa

TASKS = {"samsum": samsum, "trivia_qa": trivia_qa, "own": own}
