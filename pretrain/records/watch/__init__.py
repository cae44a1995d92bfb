"""What `headway watch` shows, from the files of run folders alone; loads neither torch nor the config."""
