package nbd

// This file says which requests a session refuses, and with which error. The rules are those
// of "Request types" and "Error values" in doc/proto.md of the NBD project.

// check finds what is wrong with r before anything is done.
func (s *session) check(r *request) errno {
	if s.refuse {
		return eShutdown
	}
	flags := r.flags
	if s.wdev != nil {
		flags &^= cmdFlagFUA // advertised, so it is allowed with every command
	}
	switch r.cmd {
	case cmdRead:
		if s.structured {
			flags &^= cmdFlagDF
		}
		switch {
		case flags != 0 || !r.within(s.size):
			return eInval
		case r.length > maxPayload && s.structured:
			return eOverflow
		case r.length > maxPayload:
			return eInval
		}
	case cmdWrite:
		switch {
		case s.wdev == nil:
			return ePerm
		case flags != 0 || r.length > maxPayload:
			return eInval
		case !r.within(s.size):
			return eNoSpace
		}
	case cmdTrim:
		switch {
		case s.wdev == nil:
			return ePerm
		case flags != 0 || !r.within(s.size):
			return eInval
		}
	case cmdWriteZeroes:
		flags &^= cmdFlagNoHole | cmdFlagFastZero
		switch {
		case s.wdev == nil:
			return ePerm
		case flags != 0:
			return eInval
		case !r.within(s.size):
			return eNoSpace
		case r.flags&cmdFlagFastZero != 0 && r.flags&cmdFlagNoHole != 0:
			return eNotSup // allocating is not known to be faster than writing
		}
	case cmdFlush:
		if flags != 0 || r.offset != 0 || r.length != 0 {
			return eInval
		}
	case cmdCache:
		if flags != 0 || !r.within(s.size) {
			return eInval
		}
	case cmdBlockStatus:
		flags &^= cmdFlagReqOne
		if flags != 0 || len(s.contexts) == 0 || r.length == 0 || !r.within(s.size) {
			return eInval
		}
	default:
		return eInval
	}
	return 0
}
