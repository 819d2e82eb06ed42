"""What stands around a run and sees it through its paid calls: a journal, other processes, a progress bar."""
