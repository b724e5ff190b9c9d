"""cvfast in other libraries; each module needs its library only when it is asked to do something."""
