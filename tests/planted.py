"""What was planted in the rows of tests/fixtures: how many rows there are, and how many carry each flaw."""

# name of the flaw -> number of rows that carry it
PLANTED = {
    # samsum
    "samsum_empty_dialogue_train": 1,
    "samsum_newline_in_summary_train": 1,
    "samsum_odd_id_train": 1,  # 13728057-1
    "samsum_summary_marker_in_dialogue_test": 1,  # a speaker's line whose text starts with "Summary:"
    "samsum_validation_dialogue_in_test": 4,  # the same dialogue, another summary
    "samsum_train_dialogue_in_test": 3,  # the same dialogue and summary
    "samsum_near_duplicate_train_test": 3,  # one word more in a long dialogue (5-gram Jaccard over 0.9)
    "samsum_duplicate_in_train": 2,  # the same dialogue and summary under a second id
    # trivia_qa
    "trivia_qa_no_alias_in_pages_train": 4,
    "trivia_qa_no_alias_in_pages_validation": 2,
    "trivia_qa_alias_inside_words_train": 3,  # "ash" only in "washed"
    "trivia_qa_alias_inside_words_validation": 1,
    "trivia_qa_empty_pages_train": 1,
    "trivia_qa_no_aliases_train": 1,
    "trivia_qa_empty_question_train": 1,
    "trivia_qa_train_question_in_validation": 2,
    "trivia_qa_near_duplicate_train_validation": 2,  # one word changed in a long question
    "trivia_qa_same_question_id_train": 1,  # one id stands on two different questions
    "trivia_qa_zero_width_pages": 6,
    "trivia_qa_control_character_pages": 4,
    "trivia_qa_crlf_pages": 8,
    "trivia_qa_answer_marker_pages": 1,  # a line of a page starts with "Answer:"
}
SAMSUM_ROWS = {"train": 500, "validation": 70, "test": 130}
TRIVIA_QA_ROWS = {"train": 740, "validation": 130}
